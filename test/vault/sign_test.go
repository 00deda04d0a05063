package vault_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	upstream "github.com/meshca/meshca/ca/upstream/vault"
)

func TestSignAndRenew(t *testing.T) {
	w := newWorld(t, shared)
	u := w.open(nil)
	issuer := named(t, u)
	l := line(t, u, issuer)
	first := renew(t, l)
	second := renew(t, l)
	if len(first) != 1 || len(second) != 1 || first[0].Equal(second[0]) || first[0].PublicKey.(*ecdsa.PublicKey).Equal(second[0].PublicKey) {
		t.Fatalf("chains of %d and %d, want two intermediates with keys of their own, without the root", len(first), len(second))
	}
	c := second[0]
	switch {
	case len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://mesh.example",
		len(c.DNSNames)+len(c.EmailAddresses)+len(c.IPAddresses) != 0:
		t.Errorf("names: %v %v %v", c.URIs, c.DNSNames, c.EmailAddresses)
	case c.Subject.CommonName != "meshca intermediate":
		t.Errorf("subject: %s", c.Subject)
	case !c.IsCA || c.MaxPathLen != 0 || !c.MaxPathLenZero || c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || len(c.ExtKeyUsage) != 0:
		t.Errorf("CA %v, path length %d, usages %b %v", c.IsCA, c.MaxPathLen, c.KeyUsage, c.ExtKeyUsage)
	case time.Since(c.NotBefore) < 4*time.Minute, time.Since(c.NotBefore) > 6*time.Minute:
		t.Errorf("valid from %s", c.NotBefore)
	case time.Until(c.NotAfter) < 71*time.Hour+59*time.Minute, time.Until(c.NotAfter) > 72*time.Hour:
		t.Errorf("valid until %s", c.NotAfter)
	}
	if st := u.Status(); !st.LoggedIn || st.LastError != nil || st.ClockAhead != 0 || st.IssuerID != issuer.Ref || time.Until(st.LeaseEnds) > time.Hour {
		t.Errorf("status: %+v", st)
	}
	if found := u.Check(t.Context()); len(found) != 0 {
		t.Errorf("check: %+v", found)
	}
	if w.made(upstream.OpLogin) != 1 || w.made(upstream.OpSign) != 2 {
		t.Errorf("%d logins and %d signings", w.made(upstream.OpLogin), w.made(upstream.OpSign))
	}
}

// TestTheDefaultIssuerMoves: to another key, and so does the name that the configuration has.
func TestTheDefaultIssuerMoves(t *testing.T) {
	w := newWorld(t, shared)
	u := w.open(nil)
	first := named(t, u)
	l := line(t, u, first)
	renew(t, l)

	made := w.write(w.mount+"/root/rotate/internal", map[string]any{"common_name": "mesh.example root", "issuer_name": "root-2", "exclude_cn_from_sans": true,
		"key_type": "ec", "ttl": "87600h"})
	other := made["issuer_id"].(string)
	w.write(w.mount+"/config/issuers", map[string]any{"default": other})
	issuers, err := u.Issuers(t.Context())
	must(t, err)
	if len(issuers) != 2 || issuers[0].Ref != first.Ref || issuers[1].Ref != other || issuers[1].Name != "root-2" || issuers[1].Named || issuers[1].Fault != nil ||
		issuers[1].Root.Equal(first.Root) {
		t.Fatalf("issuers: %+v", issuers)
	}
	if chain := renew(t, l); chain[0].CheckSignatureFrom(first.Root) != nil {
		t.Error("the intermediate is signed by another than the issuer that was named")
	}
	// Its successor signs as well, for whoever asks for it.
	if chain := renew(t, line(t, u, issuers[1])); chain[0].CheckSignatureFrom(issuers[1].Root) != nil {
		t.Error("the second issuer's intermediate is not signed by it")
	}

	// The name is given to the second one, too.
	w.write(w.mount+"/issuer/"+first.Ref, map[string]any{"issuer_name": "root-old"})
	w.write(w.mount+"/issuer/"+other, map[string]any{"issuer_name": "root-1"})
	if again := named(t, u); again.Ref != first.Ref || again.Name != "root-old" {
		t.Errorf("named by now: %+v", again)
	}
	if chain := renew(t, l); chain[0].CheckSignatureFrom(first.Root) != nil {
		t.Error("the intermediate is signed by the one that has the name now")
	}
	if found := u.Check(t.Context()); len(found) != 1 || !found[0].Warning || !strings.Contains(found[0].Why, other) {
		t.Errorf("check: %+v, want a warning of the name", found)
	}
}

func TestRootThatIsNotInTheMount(t *testing.T) {
	w := newWorld(t, shared)
	above := newWorld(t, shared)
	above.write(above.mount+"/root/rotate/internal", map[string]any{"common_name": "above", "issuer_name": "above", "key_type": "ec", "ttl": "87600h"})
	root := above.read(above.mount + "/issuer/above")["certificate"].(string)

	csr := w.write(w.mount+"/intermediate/generate/internal", map[string]any{"common_name": "below", "key_type": "ec"})
	signed := above.write(above.mount+"/issuer/above/sign-intermediate", map[string]any{"csr": csr["csr"], "common_name": "below", "ttl": "8760h"})
	imported := w.write(w.mount+"/intermediate/set-signed", map[string]any{"certificate": signed["certificate"]})
	id := imported["imported_issuers"].([]any)[0].(string)

	u := w.open(func(c *upstream.Config) { c.Issuer = id })
	issuers, err := u.Issuers(t.Context())
	must(t, err)
	if issuers[0].Ref != id || issuers[0].Root != nil || issuers[0].Fault == nil || !strings.Contains(issuers[0].Fault.Error(), "rootFile") {
		t.Fatalf("got %+v, want a fault that asks for rootFile", issuers[0])
	}
	u = w.open(func(c *upstream.Config) { c.Issuer, c.RootFile = id, w.file("root.pem", root) })
	if chain := renew(t, line(t, u, named(t, u))); len(chain) != 2 || chain[1].Subject.CommonName != "below" {
		t.Errorf("a chain of %d, want the intermediate and its issuer", len(chain))
	}
}

// TestIssuerThatIsDeleted: the one in use is shown with a fault, and its signing fails.
func TestIssuerThatIsDeleted(t *testing.T) {
	w := newWorld(t, shared)
	u := w.open(nil)
	issuer := named(t, u)
	l := line(t, u, issuer)
	_, err := w.Client.Logical().DeleteWithContext(t.Context(), w.mount+"/issuer/"+issuer.Ref)
	must(t, err)
	w.write(w.mount+"/root/generate/internal", map[string]any{"common_name": "another", "issuer_name": "root-1", "key_type": "ec", "ttl": "87600h"})
	issuers, err := u.Issuers(t.Context())
	must(t, err)
	if len(issuers) != 2 || issuers[0].Ref != issuer.Ref || !issuers[0].Named || issuers[0].Fault == nil || issuers[1].Named {
		t.Errorf("issuers: %+v", issuers)
	}
	if _, err := l.Renew(t.Context()); upstream.KindOf(err) != upstream.KindMissing || l.Ready() == nil {
		t.Errorf("got %v, want an error that says so", err)
	}
}

// TestShortenedLife: Vault shortens without an error, to the mount's longest lease and to the issuer's own end.
func TestShortenedLife(t *testing.T) {
	for name, shorten := range map[string]func(w *world){
		"longest lease": func(w *world) { w.write("sys/mounts/"+w.mount+"/tune", map[string]any{"max_lease_ttl": "20h"}) },
		"issuer's end": func(w *world) {
			made := w.write(w.mount+"/root/rotate/internal", map[string]any{"common_name": "short", "issuer_name": "short", "key_type": "ec", "ttl": "20h"})
			w.write(w.mount+"/issuer/root-1", map[string]any{"issuer_name": "root-old"})
			w.write(w.mount+"/issuer/"+made["issuer_id"].(string), map[string]any{"issuer_name": "root-1", "leaf_not_after_behavior": "always_enforce_err"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, shared)
			shorten(w)
			u := w.open(nil)
			chain := renew(t, line(t, u, named(t, u)))
			if left := time.Until(chain[0].NotAfter); left > 20*time.Hour || left < 19*time.Hour {
				t.Errorf("it lives for %s", left)
			}
			last := w.calls[len(w.calls)-1]
			if !last.Shortened() || last.Asked != 72*time.Hour || last.Got > 20*time.Hour {
				t.Errorf("observed %+v", last)
			}
			if found := u.Check(t.Context()); name == "issuer's end" && (len(found) != 1 || !strings.Contains(found[0].What, "ends before an intermediate would")) {
				t.Errorf("check: %+v", found)
			}
		})
	}
}

// TestLoginLasts: with a lease of two seconds, a LifetimeWatcher at work on a real Vault.
func TestLoginLasts(t *testing.T) {
	w := newWorld(t, shared)
	w.write("auth/"+w.approle+"/role/meshca", map[string]any{"token_policies": w.policy, "token_no_default_policy": true, "token_period": "2s"})
	u := w.open(nil)
	w.run(u)
	eventually(t, 20*time.Second, func() error {
		if w.made(upstream.OpRenew) < 3 {
			return errors.New("not renewed three times")
		}
		return nil
	})
	if issuer := named(t, u); issuer.Ref == "" || w.made(upstream.OpLogin) != 1 {
		t.Errorf("%d logins, want one", w.made(upstream.OpLogin))
	}

	// A lease that cannot be extended: the next login comes before it ends.
	w.write("auth/"+w.approle+"/role/meshca", map[string]any{"token_policies": w.policy, "token_no_default_policy": true, "token_period": 0, "token_ttl": "3s", "token_max_ttl": "3s"})
	w.revokeLogins()
	_ = named(t, u)
	before := w.made(upstream.OpLogin)
	eventually(t, 20*time.Second, func() error {
		if w.made(upstream.OpLogin) < before+2 {
			return errors.New("no two further logins")
		}
		return nil
	})
}

// revokeLogins ends every token that this world's AppRole gave.
func (w *world) revokeLogins() {
	w.t.Helper()
	w.write("sys/leases/revoke-prefix/auth/"+w.approle+"/login", nil)
}

// TestAPolicyForOneIssuerAlone: as deploy/vault/meshca.hcl says. Another issuer of the mount is a candidate that cannot be
// read, and nothing else: no failure, and no login.
func TestAPolicyForOneIssuerAlone(t *testing.T) {
	w := newWorld(t, shared)
	alone := named(t, w.open(nil)).Ref
	w.setPolicy(strings.ReplaceAll(w.documented(), w.mount+"/issuer/+", w.mount+"/issuer/"+alone))
	w.write(w.mount+"/root/rotate/internal", map[string]any{"common_name": "mesh.example root", "issuer_name": "root-2", "key_type": "ec", "ttl": "87600h"})
	u, before := w.open(nil), w.made(upstream.OpLogin)
	for range 3 {
		issuers, err := u.Issuers(t.Context())
		if err != nil || len(issuers) != 2 || issuers[0].Fault != nil || issuers[1].Name != "root-2" || upstream.KindOf(issuers[1].Fault) != upstream.KindDenied {
			t.Fatalf("got %+v, %v", issuers, err)
		}
	}
	renew(t, line(t, u, named(t, u)))
	if logins := w.made(upstream.OpLogin) - before; logins != 1 || u.Status().LastError != nil {
		t.Errorf("%d logins, and the status says %v", logins, u.Status().LastError)
	}
	if found := u.Check(t.Context()); len(found) != 0 {
		t.Errorf("check: %+v", found)
	}
}
