"""Every method on the same two real tasks: the table and the figure of docs/methods.md."""
