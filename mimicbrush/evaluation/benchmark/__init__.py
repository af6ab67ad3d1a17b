"""The benchmark of the paper's tracks (Sec. 3.4): its layout and its builder."""
