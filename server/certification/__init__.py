"""The certification service: certifies submitted models, and serves the smoothed classifiers."""
