"""Where the time of a model's step goes: op by op as it runs, and kernel by kernel as compiled."""
