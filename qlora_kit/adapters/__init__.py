"""What is trained on top of the frozen base: a room for each family of methods, and their files.

The modules beside the rooms are the same for all methods: `protocol.py` says what a method is
made of, `inject.py` puts one on a model, `registry.py` lists them by name.
"""
