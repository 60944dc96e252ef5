"""Training, evaluation and prediction for AVE, AVS and AVQA."""
