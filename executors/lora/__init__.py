"""LoRA adapters: found, checked, combined, merged."""
