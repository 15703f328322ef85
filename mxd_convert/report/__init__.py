"""The report, model card, plots and tables of a finished run. Every figure comes from the report."""
