//! `offshoot tenant`: who may use a server.

mod edit;
mod file;
mod list;

use anyhow::{Context, bail, ensure};
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use edit::{Numbers, Tenants, Token};
use file::TenantsFile;
use offshoot_server::access::{NewToken, is_tenant_name};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

/// Say who may use a server: tenants, their tokens and quotas.
///
/// Edits the tenants file of offshoot serve, comments and all; a running server takes the change within
/// seconds. What tenants use of a running server, offshoot tenants shows. `add` and `rotate` print the new token on stdout, once: the file holds only its hash.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct TenantArgs {
    #[command(subcommand)]
    what: What,
}

const EXAMPLES: &str = "\
Examples:
  offshoot tenant add blue --tenants tenants.toml > blue.token
  offshoot tenant add red --weight 2 --sessions 8 --adapter-bytes 2GiB --expires 90d
  offshoot tenant add ops --operator > ops.token
  offshoot tenant rotate blue --expires-old 24h
  offshoot tenant revoke blue --token t3f9x2ab
  offshoot tenant list
  offshoot serve --config server.toml --tenants tenants.toml
  OFFSHOOT_TOKEN=$(cat blue.token) offshoot train ...";

#[derive(Subcommand)]
enum What {
    /// Add a tenant, with a token, which is printed once
    Add(Box<AddArgs>),
    /// Give a tenant a new token, which is printed once; the old ones end after a while
    Rotate(RotateArgs),
    /// Take one or all tokens from a tenant, at once
    Revoke(RevokeArgs),
    /// Take a tenant out; its sessions are saved, and stay in the store under its name
    Remove(RemoveArgs),
    /// Show tenants, tokens and quotas
    List(ListArgs),
}

#[derive(Args)]
struct FileArgs {
    /// The tenants file [default: that of --config, or tenants.toml].
    #[arg(long, value_name = "FILE")]
    tenants: Option<PathBuf>,
    /// The server's settings, whose access.tenants names the file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Args)]
struct AddArgs {
    /// 1 to 64 of a to z, 0 to 9 and "-".
    name: String,
    /// Share of the device against other tenants, 1 to 1000 [default: 1].
    #[arg(long, value_name = "N")]
    weight: Option<u64>,
    /// Most sessions that are live at a time.
    #[arg(long, value_name = "N")]
    sessions: Option<u64>,
    /// Most sessions in the store, live ones included.
    #[arg(long, value_name = "N")]
    stored_sessions: Option<u64>,
    /// Most bytes of adapters with gradients and optimizers on the device, such as 2GiB.
    #[arg(long, value_name = "SIZE")]
    adapter_bytes: Option<ByteSize>,
    /// Most bytes of open microbatches and caches on the device, such as 4GiB.
    #[arg(long, value_name = "SIZE")]
    open_bytes: Option<ByteSize>,
    /// Most tokens of forwards in a second, averaged over a few.
    #[arg(long, value_name = "TOKENS")]
    tokens_per_second: Option<u64>,
    /// Most tokens in one microbatch.
    #[arg(long, value_name = "TOKENS")]
    tokens_per_microbatch: Option<u64>,
    /// Highest LoRA rank.
    #[arg(long, value_name = "R")]
    rank: Option<u64>,
    /// Let it see the whole server and manage everybody's sessions: list, evict, pin and delete them, but
    /// not train, restore or export them.
    #[arg(long)]
    operator: bool,
    /// When the token ends: from now, such as 90d or 12h, or a day, such as 2027-06-30 [default: never].
    #[arg(long, value_name = "DURATION|DAY", value_parser = end)]
    expires: Option<SystemTime>,
    #[command(flatten)]
    file: FileArgs,
}

#[derive(Args)]
struct RotateArgs {
    /// Of the tenant.
    name: String,
    /// When the old tokens end, from now; 0s: at once.
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "24h",
        value_parser = duration
    )]
    expires_old: Duration,
    /// When the new token ends: from now, such as 90d, or a day, such as 2027-06-30 [default: never].
    #[arg(long, value_name = "DURATION|DAY", value_parser = end)]
    expires: Option<SystemTime>,
    #[command(flatten)]
    file: FileArgs,
}

#[derive(Args)]
struct RevokeArgs {
    /// Of the tenant.
    name: String,
    /// The token with this id, which also stands in its text: ofs_ID_... [default: all].
    #[arg(long, value_name = "ID")]
    token: Option<String>,
    #[command(flatten)]
    file: FileArgs,
}

#[derive(Args)]
struct RemoveArgs {
    /// Of the tenant.
    name: String,
    #[command(flatten)]
    file: FileArgs,
}

#[derive(Args)]
struct ListArgs {
    /// Print JSON: with name, weight, is_operator, quotas, and tokens with id, expires and is_expired.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    file: FileArgs,
}

/// Runs the subcommand.
pub fn run(args: TenantArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        What::Add(args) => add(&args)?,
        What::Rotate(args) => rotate(&args)?,
        What::Revoke(args) => revoke(&args)?,
        What::Remove(args) => remove(&args)?,
        What::List(args) => {
            let file = TenantsFile::open(args.file.path()?)?;
            list::print(&file.must_exist()?.checked()?, args.json)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl FileArgs {
    fn path(&self) -> anyhow::Result<PathBuf> {
        if let Some(path) = &self.tenants {
            return Ok(path.clone());
        }
        let settings = crate::serve_config::settings(self.config.as_deref(), json!({}))?;
        match (settings.access.tenants, &self.config) {
            (Some(path), _) => Ok(path),
            (None, None) => Ok("tenants.toml".into()),
            (None, Some(config)) => {
                let config = config.display();
                bail!(
                    "{config} names no tenants file; give it with --tenants FILE, and let \
                       access.tenants in {config} name it, too"
                )
            }
        }
    }
}

fn add(args: &AddArgs) -> anyhow::Result<()> {
    let name = &args.name;
    ensure!(
        is_tenant_name(name),
        "the name is {name:?}: expected 1 to 64 of a to z, 0 to 9 and \"-\""
    );
    let (new, expires) = (NewToken::generate(), args.expires);
    let file = TenantsFile::open(args.file.path()?)?;
    file.change(|tenants: &mut Tenants| {
        tenants.add(name, &args.numbers(), Token::new(&new, expires))
    })?;
    print_once(&new)?;
    eprintln!(
        "Tenant {name} is in {}. Its token (id {}) was printed on stdout and is stored nowhere; {name} sends \
         it as OFFSHOOT_TOKEN or with --token-file.",
        file.path().display(),
        new.id
    );
    for (option, quota) in
        [("--sessions", args.sessions), ("--stored-sessions", args.stored_sessions)]
    {
        if quota == Some(0) {
            eprintln!("warning: with {option} 0 {name} cannot open a session");
        }
    }
    Ok(())
}

fn rotate(args: &RotateArgs) -> anyhow::Result<()> {
    let name = &args.name;
    let (new, expires) = (NewToken::generate(), args.expires);
    let old_end = SystemTime::now() + args.expires_old;
    let file = TenantsFile::open(args.file.path()?)?;
    let file = file.must_exist()?;
    file.change(|tenants| tenants.rotate(name, Token::new(&new, expires), old_end))?;
    print_once(&new)?;
    eprintln!(
        "Tenant {name} has a new token (id {}), printed on stdout and stored nowhere. Its old ones end {}.",
        new.id,
        humantime::format_rfc3339_seconds(old_end)
    );
    Ok(())
}

fn revoke(args: &RevokeArgs) -> anyhow::Result<()> {
    let file = TenantsFile::open(args.file.path()?)?;
    let file = file.must_exist()?;
    let revoked = file.change(|tenants| tenants.revoke(&args.name, args.token.as_deref()))?;
    let all = revoked.join(", ");
    let name = &args.name;
    eprintln!("Tenant {name}: revoked the tokens with id {all}. Their streams end within seconds.");
    Ok(())
}

fn remove(args: &RemoveArgs) -> anyhow::Result<()> {
    let (name, file) = (&args.name, TenantsFile::open(args.file.path()?)?);
    let file = file.must_exist()?;
    file.change(|tenants| tenants.remove(name))?;
    eprintln!(
        "Tenant {name} is out. Its sessions are saved and stay in the server's store; whoever is added \
         under the name {name} has them, so do not give it to another team."
    );
    Ok(())
}

/// The only place that a token's text goes to.
fn print_once(token: &NewToken) -> anyhow::Result<()> {
    use std::io::Write;
    println!("{}", token.text());
    std::io::stdout().flush().context("the token could not be printed; rotate to make another")
}

/// From now, within what the file's format can hold.
fn duration(text: &str) -> Result<Duration, String> {
    // Year 9999 is as far as it goes.
    const MOST: Duration = Duration::from_secs(1000 * 365 * 24 * 3600);
    let expected = "expected a time from now with its unit, such as 90d, 12h or 30min";
    let duration = humantime::parse_duration(text).map_err(|_| expected.to_string())?;
    if duration > MOST { Err("at most 1000 years".into()) } else { Ok(duration) }
}

/// When a token ends, which must be later than now.
fn end(text: &str) -> Result<SystemTime, String> {
    // A day is meant until it begins, in UTC; with a time it is what the file has.
    let day = humantime::parse_rfc3339_weak(&format!("{text}T00:00:00Z"));
    let now = SystemTime::now();
    let end = match day.or_else(|_| humantime::parse_rfc3339(text)) {
        Ok(end) => end,
        Err(_) => {
            now + duration(text)
                .map_err(|error| format!("{error}; or a day, such as 2027-06-30 (UTC)"))?
        }
    };
    if end <= now { Err("such a token has ended before it begins".into()) } else { Ok(end) }
}

impl AddArgs {
    fn numbers(&self) -> Numbers {
        let size = |bytes: Option<ByteSize>| bytes.map(|bytes| bytes.as_u64());
        Numbers {
            weight: self.weight,
            is_operator: self.operator,
            quotas: [
                ("sessions", self.sessions),
                ("stored_sessions", self.stored_sessions),
                ("adapter_bytes", size(self.adapter_bytes)),
                ("open_bytes", size(self.open_bytes)),
                ("tokens_per_second", self.tokens_per_second),
                ("tokens_per_microbatch", self.tokens_per_microbatch),
                ("rank", self.rank),
            ],
        }
    }
}
