"""What limits the tokens of running requests: where each sample and beam stands in it. Imported by the host's steps and
beams, and by requests."""
