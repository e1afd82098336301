"""Training: SFT, LoRA-SFT, DPO, PPO, GRPO and reward models, on TRL."""
