"""What the deterioration study is made of: facts, learners, measures, plots."""
