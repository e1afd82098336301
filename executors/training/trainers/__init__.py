"""Models and TRL's trainers, one builder for each kind of training."""
