"""The specs of the kinds of training: light, the daemon validates with them."""
