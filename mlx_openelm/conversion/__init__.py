"""From any form of OpenELM weights to one MLX folder."""
