"""Trials of load: many images, many calls, many visitors; memory stays flat and nothing is lost or mixed up."""
