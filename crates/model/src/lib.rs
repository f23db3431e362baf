//! offshoot-model
