"""Text generation with Transformers."""
