"""Parameter-free operations: pure functions of arrays with static shapes; noise is an argument."""
