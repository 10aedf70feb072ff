"""Public data sets to prompt files: sources that are streamed, one module for each data set, output with a manifest."""
