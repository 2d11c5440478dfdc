"""What embeds: backbones, heads, and the model that they make."""
