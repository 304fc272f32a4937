"""The control plane: sessions, turns, admission. No torch here."""
