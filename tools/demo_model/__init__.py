"""How the demo model is made: its world, texts, recipe and data card."""
