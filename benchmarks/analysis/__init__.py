"""What adapters of the demo model learned: the record and the figure of docs/analysis.md."""
