package agent

import "github.com/meshca/meshca/rotation"

// restore takes up what an earlier run kept, so that it is served also while the CA is gone. It returns the term of the
// agent's own SVID.
func (a *Agent) restore() (own *rotation.Term, err error) {
	if err := a.addKnown(); err != nil {
		return nil, err
	}
	names := make(map[string]bool)
	for _, w := range a.roster.list() {
		names[w.name] = true
		a.restoreWorkload(w)
	}
	if err := a.store.prune(names); err != nil {
		a.log.Warn("keys of workloads that are gone cannot be removed", "dir", a.store.dir, "error", err)
	}
	a.proxies.load(a.roster.list())
	h, _ := a.restored(selfName, Workload{}, a.config.TokenFile)
	if h == nil {
		return nil, nil
	}
	if !a.self.mayBe(h.svid.ID) {
		a.log.Warn("the kept SVID is no agent's of this cluster; attesting anew", "spiffe_id", h.svid.ID.String(), "cluster", a.config.Cluster)
		a.forget(selfName)
		return nil, nil
	}
	a.self.restore(h)
	return &h.term, nil
}

// addKnown takes in the workloads that sources had in an earlier run.
func (a *Agent) addKnown() error {
	for _, s := range a.config.Sources {
		known, err := s.Known()
		if err != nil {
			return err
		}
		for _, c := range known {
			c = c.withDefaults()
			err := c.check("a workload of an earlier run")
			if err == nil {
				err = a.roster.add(newWorkload(c, a, a.trust, &a.clock, a.log))
			}
			if err != nil {
				a.log.Error("a workload of an earlier run is not taken up", "socket", c.Socket, "error", err)
			}
		}
	}
	return nil
}

// restoreWorkload takes up what was kept of one workload.
func (a *Agent) restoreWorkload(w *workload) {
	h, former := a.restored(w.name, w.Workload, w.TokenFile)
	if h == nil {
		w.formerly(former)
		return
	}
	w.restore(h)
	a.renewals.hold(&w.orders, w.holds, w.phase)
	if a.denials.fault() == nil {
		w.denials()
	} else {
		w.renewNow() // the CA's word on this one may come before the whole list
	}
}

// restored is what was kept under the name, unless the token file names somebody else by now: then it is gone, and whose it was
// is said. A file that cannot be read says nothing against what it was read for before.
func (a *Agent) restored(name string, w Workload, tokenFile string) (h *held, former Bearer) {
	h, whose, err := a.store.load(name, w, a.config.TrustDomain)
	if err != nil {
		a.log.Warn("a kept SVID cannot be used; a new one is asked for", "socket", w.Socket, "error", err)
		return nil, Bearer{}
	}
	if h == nil {
		return nil, whose
	}
	if token, err := readToken(tokenFile); err == nil && whose.Other(token.bearer()) {
		a.log.Warn("a kept SVID is not used: the token file names somebody else by now", "token_file", tokenFile, "spiffe_id", h.svid.ID.String())
		if err := a.store.disown(name, w, whose); err != nil {
			a.log.Warn("whose a kept SVID was cannot be kept", "socket", w.Socket, "error", err)
			a.forget(name)
		}
		return nil, whose
	}
	return h, Bearer{}
}

// forget removes what is kept under the name.
func (a *Agent) forget(name string) {
	if err := a.store.remove(name); err != nil {
		a.log.Error("a kept SVID cannot be removed from the runtime directory", "error", err)
	}
}
