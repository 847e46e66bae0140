"""Looking at data and networks: metrics, logits, curves, evaluation figures, the report, EDA."""
