"""What the tests share: models, comparisons, small trainings, processes; no tests."""
