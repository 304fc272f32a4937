"""Protobuf code generated from proto/kimia/v1 by `make proto`; never edited by hand."""
