use crate::access::Caller;
use crate::error::Error;
use crate::session::SessionId;
use crate::store::Store;
use dashmap::DashMap;
use std::collections::HashMap;
use std::sync::Arc;

/// Whose each session is, those in the store included. The one place that decides whether a caller
/// may name a session: a look into memory, whatever the answer, so that another tenant's session and
/// one that was never there cannot be told apart.
pub struct Owners(DashMap<SessionId, Arc<str>>);

/// A session that its caller may name. Only [`Owners::check`] makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnSession(SessionId);

/// A session that its caller may list, move and delete: his own, or anybody's for an operator. Only
/// [`Owners::check_managed`] makes it. What reads or trains an adapter takes an [`OwnSession`] instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManagedSession(SessionId);

impl OwnSession {
    /// The id.
    pub fn id(self) -> SessionId {
        self.0
    }
}

impl ManagedSession {
    /// The id.
    pub fn id(self) -> SessionId {
        self.0
    }
}

impl From<OwnSession> for ManagedSession {
    fn from(own: OwnSession) -> ManagedSession {
        ManagedSession(own.0)
    }
}

impl Owners {
    /// Those of all sessions in the store. Blocks.
    pub fn load(store: &Store) -> Result<Owners, Error> {
        let owners = Owners(DashMap::new());
        for (id, record) in store.records() {
            owners.insert(id, record.tenant.as_str().into());
        }
        Ok(owners)
    }

    /// The session that a tenant means by this text, if it is his own.
    pub fn check(&self, tenant: &str, text: &str) -> Result<OwnSession, Error> {
        let Some(id) = SessionId::parse(text) else {
            return Err(Error::UnknownSession(text.chars().take(64).collect()));
        };
        // Of a damaged record nobody knows whose it is; on an open server the store says so.
        let owner = self.0.get(&id).map_or_else(Arc::default, |owner| owner.value().clone());
        if *owner == *tenant {
            Ok(OwnSession(id))
        } else {
            Err(Error::UnknownSession(id.to_string()))
        }
    }

    /// The session that a caller means by this text, if it is his own or he is an operator.
    pub fn check_managed(&self, caller: &Caller, text: &str) -> Result<ManagedSession, Error> {
        match SessionId::parse(text).filter(|_| caller.manages_all()) {
            // Of one that is not there, or whose record is damaged, the store knows more.
            Some(id) => Ok(ManagedSession(id)),
            None => self.check(&caller.tenant.name, text).map(ManagedSession::from),
        }
    }

    /// All sessions that a caller may manage.
    pub fn managed(&self, caller: &Caller) -> Vec<ManagedSession> {
        if caller.manages_all() {
            return self.0.iter().map(|entry| ManagedSession(*entry.key())).collect();
        }
        let own = self.sessions(&caller.tenant.name);
        own.into_iter().map(ManagedSession::from).collect()
    }

    /// How many sessions each tenant has, those in the store included.
    pub fn counts(&self) -> HashMap<Arc<str>, usize> {
        let mut counts = HashMap::new();
        for entry in self.0.iter() {
            *counts.entry(entry.value().clone()).or_default() += 1;
        }
        counts
    }

    /// Whose a session is, if it is known.
    pub fn of(&self, id: SessionId) -> Option<Arc<str>> {
        self.0.get(&id).map(|owner| owner.value().clone())
    }

    /// All sessions of a tenant.
    pub fn sessions(&self, tenant: &str) -> Vec<OwnSession> {
        let own = self.0.iter().filter(|entry| **entry.value() == *tenant);
        own.map(|entry| OwnSession(*entry.key())).collect()
    }

    /// How many sessions a tenant has, those in the store included.
    pub fn count(&self, tenant: &str) -> usize {
        self.0.iter().filter(|entry| **entry.value() == *tenant).count()
    }

    /// How many sessions have no tenant, or one that is not in this list.
    pub fn count_others(&self, is_tenant: impl Fn(&str) -> bool) -> usize {
        self.0.iter().filter(|entry| !is_tenant(entry.value())).count()
    }

    pub(super) fn insert(&self, id: SessionId, tenant: Arc<str>) {
        self.0.insert(id, tenant);
    }

    pub(super) fn remove(&self, id: SessionId) {
        self.0.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_its_owners_and_nobody_else_learns_of_it() {
        let owners = Owners(DashMap::new());
        let [own, other, nobodys, forged] = [(); 4].map(|()| SessionId::new());
        owners.insert(own, "blue".into());
        owners.insert(other, "red".into());
        owners.insert(nobodys, Arc::default());
        let check = |tenant: &str, id: SessionId| owners.check(tenant, &id.to_string());
        assert_eq!(check("blue", own).unwrap().id(), own);
        for id in [other, nobodys, forged] {
            let error = check("blue", id).unwrap_err().to_string();
            assert_eq!(error, Error::UnknownSession(id.to_string()).to_string());
        }
        let long = "x".repeat(1000);
        let error = owners.check("blue", &long).unwrap_err().to_string();
        assert_eq!(error, Error::UnknownSession("x".repeat(64)).to_string());
        // On an open server the store knows more of what is not here.
        assert!(check("", nobodys).is_ok() && check("", forged).is_ok());
        assert!(check("", own).is_err());
        assert_eq!(owners.sessions("red").iter().map(|s| s.id()).collect::<Vec<_>>(), [other]);
        assert_eq!((owners.count("blue"), owners.count("green")), (1, 0));
        assert_eq!(owners.count_others(|tenant| tenant == "blue"), 2);
        owners.remove(own);
        assert!(check("blue", own).is_err());
    }

    #[test]
    fn an_operator_manages_all_and_owns_his_own_only() {
        let owners = Owners(DashMap::new());
        let [of_blue, of_ops, nobodys, forged] = [(); 4].map(|()| SessionId::new());
        owners.insert(of_blue, "blue".into());
        owners.insert(of_ops, "ops".into());
        owners.insert(nobodys, Arc::default());
        let caller = |name: &str, is_operator| Caller::of_test(name, is_operator);
        let (ops, blue, open) = (caller("ops", true), caller("blue", false), caller("", true));
        let managed = |caller: &Caller| {
            let mut ids: Vec<_> = owners.managed(caller).iter().map(|s| s.id()).collect();
            ids.sort();
            ids
        };
        let mut all = vec![of_blue, of_ops, nobodys];
        all.sort();
        assert_eq!(managed(&ops), all);
        assert_eq!((managed(&blue), managed(&open)), (vec![of_blue], vec![nobodys]));
        let text = forged.to_string();
        for id in [of_blue, of_ops, nobodys] {
            let may = |caller: &Caller| owners.check_managed(caller, &id.to_string()).is_ok();
            assert_eq!([may(&ops), may(&blue), may(&open)], [true, id == of_blue, id == nobodys]);
        }
        // To train, restore or export is for its owner alone.
        assert!(owners.check("ops", &of_blue.to_string()).is_err());
        let told = |caller: &Caller, text: &str| owners.check_managed(caller, text).unwrap_err();
        let hidden = told(&blue, &of_ops.to_string()).to_string();
        assert_eq!(hidden.replace(&of_ops.to_string(), &text), told(&blue, &text).to_string());
        assert!(told(&ops, "no id").to_string().contains("no id"));
        assert_eq!(owners.counts().get("blue"), Some(&1));
    }
}
