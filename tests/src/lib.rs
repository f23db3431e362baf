//! Helpers of the claims: a tiny model, a server on a free port.
