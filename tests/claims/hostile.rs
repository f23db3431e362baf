//! Clients that wish the server ill, beside one that trains.
