"""Correspondence, measured: keypoints of one picture are carried to another, and counted where they arrive (PCK)."""
