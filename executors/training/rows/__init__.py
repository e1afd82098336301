"""`data` to rows that TRL's trainers take."""
