"""GLoRA: five supports beside a linear's weight and bias."""
