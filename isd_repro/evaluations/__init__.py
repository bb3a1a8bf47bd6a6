"""Evaluation of frozen encoders: features, nearest neighbours and the linear protocol; knows no method and no data source."""
