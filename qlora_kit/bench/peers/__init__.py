"""The libraries we measure against, each behind one function `build(Build, Stage) -> Subject`."""
