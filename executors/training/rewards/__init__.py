"""What scores answers in ppo and grpo."""
