use crate::connection_args::ConnectionArgs;
use crate::train::compute_args::Wire;
use crate::train::model_args::address;
use clap::Args;

/// A server that a command can do without.
#[derive(Args, Debug)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// The trunk server, such as trunk.local:50051, with https:// before it for TLS. With it, or with --server-host or --server-port,
    /// this side holds the first and last layers only; without one, the whole model.
    #[arg(long, value_name = "URL", conflicts_with_all = ["server_host", "server_port"])]
    server: Option<String>,
    /// The trunk server's host [default with --server-port: localhost].
    #[arg(long, value_name = "HOST")]
    server_host: Option<String>,
    /// The trunk server's port [default with --server-host: 50051].
    #[arg(long, value_name = "PORT")]
    server_port: Option<u16>,
    /// Type of what travels, both ways.
    #[arg(long, value_enum, default_value_t = Wire::F32)]
    pub wire_dtype: Wire,
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

impl ServerArgs {
    /// None: no server was asked for.
    pub fn address(&self) -> Option<String> {
        let host = self.server_host.as_deref();
        let parts = || {
            (host.is_some() || self.server_port.is_some())
                .then(|| address(host.unwrap_or("localhost"), self.server_port.unwrap_or(50051)))
        };
        self.server.clone().or_else(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        server: ServerArgs,
    }

    #[test]
    fn any_of_the_three_options_means_a_server() {
        let address = |line: &str| {
            let line = Line::try_parse_from(format!("x {line}").split_whitespace()).unwrap();
            line.server.address()
        };
        assert_eq!(address(""), None);
        assert_eq!(address("--server trunk:7").as_deref(), Some("trunk:7"));
        assert_eq!(address("--server-host trunk").as_deref(), Some("trunk:50051"));
        assert_eq!(address("--server-port 7").as_deref(), Some("localhost:7"));
        let both = "x --server trunk:7 --server-port 8".split_whitespace();
        assert!(Line::try_parse_from(both).is_err());
    }
}
