"""Correspondence, measured: keypoints of one image are carried to another, and counted where they arrive (PCK)."""
