package envoy

import (
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/test/pki"
)

const webPath = "/ns/a/sa/web"

// domain is a trust domain with an SVID of a caller.
type domain struct {
	root   *pki.Root
	caller *x509svid.SVID
}

func newDomain(t *testing.T, name string) domain {
	t.Helper()
	root, err := pki.NewRoot(name)
	if err != nil {
		t.Fatal(err)
	}
	return domain{root, svidOf(t, root, "/ns/a/sa/caller")}
}

func svidOf(t *testing.T, root *pki.Root, path string) *x509svid.SVID {
	t.Helper()
	svid, err := root.SVID(path, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

func secretsOf(t *testing.T, svids []*x509svid.SVID, bundles ...*spiffebundle.Bundle) *sds.Secrets {
	t.Helper()
	s, err := sds.NewSecrets(sds.SecretsConfig{SVIDs: svids, Bundles: bundles})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestNames has Envoy ask for every kind of name at once, and then use what it got: which certificate it shows, and
// whom it lets in.
func TestNames(t *testing.T) {
	own, federated, stranger := newDomain(t, "td.test"), newDomain(t, "other.test"), newDomain(t, "td.test")
	web, second, filed := svidOf(t, own.root, webPath), svidOf(t, own.root, "/ns/a/sa/second"), svidOf(t, own.root, "/ns/a/sa/filed")
	cert, key, roots := writeFiles(t, filed, stranger.root)
	listeners := []listener{
		{"default", sds.NameDefault, sds.NameRootCA},
		{"named", second.ID.String(), "spiffe://td.test"},
		{"federated", sds.NameDefault, "spiffe://other.test"},
		{"all", sds.NameDefault, sds.NameAll},
		{"files", "file-cert:" + cert + "~" + key, "file-root:" + roots},
	}
	for _, api := range apis {
		t.Run(api, func(t *testing.T) {
			d := openDoor(t, secretsOf(t, []*x509svid.SVID{web, second}, own.root.Bundle(1), federated.root.Bundle(1)))
			e := start(t, 30*time.Second, settings{API: api, Socket: d.socket, Listeners: listeners})
			for _, c := range []struct {
				listener                   string
				shows                      *x509svid.SVID
				own, federated, strangerIn bool
			}{
				{"default", web, true, false, false},
				{"named", second, true, false, false},
				{"federated", web, false, true, false},
				{"all", web, true, true, false},
				{"files", filed, false, false, true},
			} {
				for caller, in := range map[*domain]bool{&own: c.own, &federated: c.federated, &stranger: c.strangerIn} {
					shown, err := greet(e.address(t, c.listener), caller.caller)
					if (err == nil) != in {
						t.Errorf("%s: a caller of %s (own root %v) gets in: %v (%v)", c.listener, caller.root.Domain, caller == &own, err == nil, err)
					}
					if err == nil && !shown.Equal(c.shows.Certificates[0]) {
						t.Errorf("%s: Envoy shows the certificate of %v", c.listener, shown.URIs)
					}
				}
			}
			if n := e.stat(t, ".update_rejected"); n != 0 {
				t.Errorf("Envoy rejected %d updates", n)
			}
			if nacks, unknown := d.seen(); len(nacks)+len(unknown) != 0 {
				t.Errorf("NACKs %+v, unknown %q", nacks, unknown)
			}
		})
	}
}

// TestTrustDomainIsBoundToItsRoot tells the two ways of validation apart: the other domain's root vouches for an
// identity of ours. Envoy's SPIFFE validator refuses that even with both roots at hand; a plain context holds only our
// root, so it refuses it too, and takes ours.
func TestTrustDomainIsBoundToItsRoot(t *testing.T) {
	own, federated := newDomain(t, "td.test"), newDomain(t, "other.test")
	impostor := svidOf(t, federated.root.As(own.root.Domain), "/ns/a/sa/caller")
	for _, api := range apis {
		for name, plain := range map[string]bool{"spiffe": false, "plain": true} {
			t.Run(api+"/"+name, func(t *testing.T) {
				listeners := []listener{{"own", sds.NameDefault, sds.NameRootCA}}
				if !plain {
					listeners = append(listeners, listener{"all", sds.NameDefault, sds.NameAll})
				}
				d := openDoor(t, secretsOf(t, []*x509svid.SVID{svidOf(t, own.root, webPath)}, own.root.Bundle(1), federated.root.Bundle(1)))
				e := start(t, 30*time.Second, settings{API: api, Socket: d.socket, Plain: plain, Listeners: listeners})
				for _, l := range listeners {
					if _, err := greet(e.address(t, l.Name), own.caller); err != nil {
						t.Errorf("%s: our own caller is refused: %v", l.Name, err)
					}
					if _, err := greet(e.address(t, l.Name), impostor); err == nil {
						t.Errorf("%s: another trust domain's root vouched for our identity", l.Name)
					}
				}
			})
		}
	}
}

// TestNack gives Envoy a certificate that it does not take (its curve): it says so once, keeps what it had, and takes
// the next good one.
func TestNack(t *testing.T) {
	own := newDomain(t, "td.test")
	first, later := svidOf(t, own.root, webPath), svidOf(t, own.root, webPath)
	broken, err := own.root.SVIDOn(elliptic.P224(), webPath, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	bundle := own.root.Bundle(1)
	for _, api := range apis {
		t.Run(api, func(t *testing.T) {
			d := openDoor(t, secretsOf(t, []*x509svid.SVID{first}, bundle))
			e := start(t, 30*time.Second, settings{API: api, Socket: d.socket, Listeners: []listener{{"one", sds.NameDefault, sds.NameRootCA}}})
			shows := func(svid *x509svid.SVID) bool {
				shown, err := greet(e.address(t, "one"), own.caller)
				return err == nil && shown.Equal(svid.Certificates[0])
			}
			d.current.Set(secretsOf(t, []*x509svid.SVID{broken}, bundle))
			eventually(t, "Envoy refuses the broken certificate", func() bool { nacks, _ := d.seen(); return len(nacks) > 0 })
			time.Sleep(2 * time.Second)
			nacks, _ := d.seen()
			if len(nacks) != 1 || !slices.Equal(nacks[0].Names, []string{sds.NameDefault}) || nacks[0].Detail == "" {
				t.Errorf("two seconds after one refusal the server saw %+v", nacks)
			}
			if n := e.stat(t, "sds.default.update_rejected"); n != 1 {
				t.Errorf("Envoy counts %d refusals, want one", n)
			}
			if !shows(first) {
				t.Error("Envoy does not go on with what it had")
			}
			d.current.Set(secretsOf(t, []*x509svid.SVID{later}, bundle))
			eventually(t, "Envoy shows the next good certificate", func() bool { return shows(later) })
		})
	}
}

// TestUnknownName has Envoy warm a listener with a secret that is not served. Delta says so, and Envoy is live at once;
// SotW cannot, and Envoy waits for its own timeout of 15 s.
func TestUnknownName(t *testing.T) {
	own := newDomain(t, "td.test")
	d := openDoor(t, secretsOf(t, []*x509svid.SVID{svidOf(t, own.root, webPath)}, own.root.Bundle(1)))
	e := start(t, 10*time.Second, settings{API: "DELTA_GRPC", Socket: d.socket, Listeners: []listener{
		{"good", sds.NameDefault, sds.NameRootCA}, {"bad", "spiffe://td.test/nobody", sds.NameRootCA},
	}})
	if _, err := greet(e.address(t, "good"), own.caller); err != nil {
		t.Errorf("the unknown name hurt another: %v", err)
	}
	if _, unknown := d.seen(); !slices.Equal(unknown, []string{"spiffe://td.test/nobody"}) {
		t.Errorf("unknown names told: %q", unknown)
	}
}

// TestServerRestart stops the server and opens another with the same secrets: Envoy comes back, is sent nothing that it
// has, and then takes what is new.
func TestServerRestart(t *testing.T) {
	own := newDomain(t, "td.test")
	first, later := svidOf(t, own.root, webPath), svidOf(t, own.root, webPath)
	for _, api := range apis {
		t.Run(api, func(t *testing.T) {
			d := openDoor(t, secretsOf(t, []*x509svid.SVID{first}, own.root.Bundle(1)))
			e := start(t, 30*time.Second, settings{API: api, Socket: d.socket, Listeners: []listener{{"one", sds.NameDefault, sds.NameRootCA}}})
			eventually(t, "Envoy took the bundle", func() bool { n, _ := d.sds.Acknowledged(1); return n == 0 })
			updates := e.stat(t, ".update_success")
			d.close()
			d.current.Set(secretsOf(t, []*x509svid.SVID{first}, own.root.Bundle(2)))
			d.open(t)
			eventually(t, "both streams are back", func() bool { return len(d.sds.Streams()) == 2 })
			eventually(t, "both hold the bundle", func() bool { n, _ := d.sds.Acknowledged(2); return n == 0 })
			if _, err := greet(e.address(t, "one"), own.caller); err != nil {
				t.Error(err)
			}
			if n := e.stat(t, ".update_success"); n != updates {
				t.Errorf("Envoy took %d updates after the restart, and nothing was new", n-updates)
			}
			d.current.Set(secretsOf(t, []*x509svid.SVID{later}, own.root.Bundle(2)))
			eventually(t, "Envoy shows the new certificate", func() bool {
				shown, err := greet(e.address(t, "one"), own.caller)
				return err == nil && shown.Equal(later.Certificates[0])
			})
			if n := e.stat(t, ".update_success"); n != updates+1 {
				t.Errorf("Envoy took %d updates for one new secret", n-updates)
			}
		})
	}
}

// writeFiles puts an SVID and a root where Envoy can read them.
func writeFiles(t *testing.T, svid *x509svid.SVID, root *pki.Root) (cert, key, roots string) {
	t.Helper()
	dir := t.TempDir()
	der, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("cert.pem", "CERTIFICATE", svid.Certificates[0].Raw), write("key.pem", "PRIVATE KEY", der),
		write("roots.pem", "CERTIFICATE", root.Cert.Raw)
}
