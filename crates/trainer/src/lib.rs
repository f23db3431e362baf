//! offshoot-trainer
