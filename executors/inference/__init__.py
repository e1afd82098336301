"""Text generation: from a spec to prompts, through an engine, to results."""
