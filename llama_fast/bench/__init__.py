"""Measuring: times beside baselines and the roofline, memory, results, reports and profiles."""
