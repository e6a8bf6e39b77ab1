"""GLoRA's super-net: structures drawn for training, and the search for the best."""
