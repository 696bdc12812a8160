"""The page of a run, made from what its folder holds, and the parts that other pages use too."""
