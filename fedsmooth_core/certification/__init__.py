"""Certification by randomized smoothing (Cohen et al. 2019): bounds, CERTIFY, PREDICT, analysis."""
