"""What was measured while weights moved: profile, trace and progress."""
