package vault

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

func TestIssuersFaults(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, f *fake, a *authority)
		want  string
	}{
		"no key":        {func(_ *testing.T, _ *fake, a *authority) { a.keyID = "" }, "the mount has no key for it"},
		"revoked":       {func(_ *testing.T, _ *fake, a *authority) { a.revoked = true }, "revoked"},
		"usage":         {func(_ *testing.T, _ *fake, a *authority) { a.usage = "read-only,crl-signing" }, "usage=read-only,issuing-certificates"},
		"ended":         {func(t *testing.T, _ *fake, a *authority) { *a = *newRootLike(t, a, -time.Minute, -1) }, "ended at"},
		"no room below": {func(t *testing.T, _ *fake, a *authority) { *a = *newRootLike(t, a, 1000*time.Hour, 0) }, "path length 0"},
		"a weak key": {func(t *testing.T, _ *fake, a *authority) {
			a.key = weakKey(t)
			*a = *newRootLike(t, a, 1000*time.Hour, -1)
		}, "1024 bits"},
		"a restricted root": {func(t *testing.T, _ *fake, a *authority) { *a = *restrictedBelow(t, a, true) },
			`"CN=root above" of its chain has extended key usages without serverAuth,`},
		"a restricted issuer": {func(t *testing.T, _ *fake, a *authority) { *a = *restrictedBelow(t, a, false) }, "`vault write pki/root/rotate/internal"},
		"no certificate":      {func(_ *testing.T, _ *fake, a *authority) { a.cert = &x509.Certificate{} }, "certificate"},
		"another's answer":    {func(_ *testing.T, f *fake, a *authority) { f.answer = asAnother(a.id) }, "another issuer"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			c.spoil(t, f, f.issuers[0])
			issuers, err := f.upstream(nil).Issuers(t.Context())
			if err != nil || len(issuers) != 1 || issuers[0].Fault == nil || !strings.Contains(issuers[0].Fault.Error(), c.want) || !issuers[0].Named {
				t.Errorf("got %+v, %v, want a fault that says %q", issuers, err, c.want)
			}
		})
	}
}

func asAnother(id string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, id) {
			return false
		}
		reply(w, 200, map[string]any{"data": map[string]any{"issuer_id": "another"}})
		return true
	}
}

func weakKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// restrictedBelow makes an issuer below a root in another one's place; the root, or else the issuer, is for clients alone.
func restrictedBelow(t *testing.T, a *authority, root bool) *authority {
	t.Helper()
	clients := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	above := newRoot(t, "root above", 1000*time.Hour)
	if root {
		template := *above.cert
		template.ExtKeyUsage = clients
		above.cert = mustSign(t, &template, &template, above.key.Public(), above.key)
		above.chain = []*x509.Certificate{above.cert}
	}
	b := newBelow(t, above, "issuer", 1000*time.Hour)
	if !root {
		template := *b.cert
		template.ExtKeyUsage = clients
		b.cert = mustSign(t, &template, above.cert, b.key.Public(), above.key)
		b.chain[0] = b.cert
	}
	b.id, b.usage = a.id, a.usage
	return b
}

// newRootLike makes a root in an issuer's place.
func newRootLike(t *testing.T, a *authority, left time.Duration, pathLength int) *authority {
	t.Helper()
	template := *a.cert
	template.PublicKey, template.SignatureAlgorithm = a.key.Public(), 0 // the key may be another one
	template.NotBefore, template.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(left)
	template.MaxPathLen, template.MaxPathLenZero = pathLength, pathLength == 0
	b := *a
	b.cert = mustSign(t, &template, &template, a.key.Public(), a.key)
	b.chain = []*x509.Certificate{b.cert}
	return &b
}

func TestIssuersOrderAndCandidates(t *testing.T) {
	f := newFake(t)
	f.add("root-2", newRoot(t, "root 2", 24*365*time.Hour))
	f.add("short", newRoot(t, "short", 20*time.Hour))
	u := f.upstream(func(c *Config) { c.Issuer = "root-2" })
	issuers, err := u.Issuers(t.Context())
	if err != nil || len(issuers) != 3 {
		t.Fatalf("got %d, %v", len(issuers), err)
	}
	if issuers[0].Name != "root-2" || !issuers[0].Named || issuers[1].Name != "root-1" || issuers[1].Named || issuers[1].Fault != nil {
		t.Errorf("got %+v, want the named one first and the others as candidates", issuers)
	}
	if issuers[2].Fault == nil || !strings.Contains(issuers[2].Fault.Error(), "before an intermediate of 72h0m0s would") {
		t.Errorf("a candidate that ends in 20h: got the fault %v", issuers[2].Fault)
	}
	if got := u.Status(); len(got.Issuers) != 3 || got.IssuerID != issuers[0].Ref || got.Notice != "" {
		t.Errorf("status: %+v", got)
	}
}

// That an issuer ends before an intermediate would is a reason not to go to it. One that signs already goes on to its end,
// with intermediates that end with it, and nothing is wrong with it before.
func TestTheIssuerThatSignsEndsSoon(t *testing.T) {
	f := newFake(t)
	short := f.add("short", newRoot(t, "short", 20*time.Hour))
	u := f.upstream(nil)
	for _, signs := range []bool{false, true, false} {
		u.Rely(func() []string {
			if signs {
				return []string{short.id}
			}
			return nil
		})
		issuers, err := u.Issuers(t.Context())
		if err != nil || len(issuers) != 2 || (issuers[1].Fault == nil) != signs {
			t.Errorf("it signs: %v, and listed is %+v, %v", signs, issuers, err)
		}
	}
	if _, err := u.SignIntermediate(t.Context(), short.id, newRequest(t)); err != nil {
		t.Errorf("it does not sign: %v", err)
	}
}

// What hinders an issuer that signs is told as a failure at each look, and not first when the next intermediate is due, whoever
// the configuration names. It is over when that is mended, or another one signs.
func TestTheIssuerThatSignsCannot(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(f *fake, a *authority)
		kind  Kind
		want  string
	}{
		"no key":  {func(_ *fake, a *authority) { a.keyID = "" }, KindOther, "has no key for it"},
		"revoked": {func(_ *fake, a *authority) { a.revoked = true }, KindOther, "was revoked"},
		"usage":   {func(_ *fake, a *authority) { a.usage = "read-only" }, KindOther, "issuing-certificates"},
		"deleted": {func(f *fake, a *authority) {
			f.issuers = slices.DeleteFunc(f.issuers, func(x *authority) bool { return x == a })
		}, KindMissing, "does not have it any more"},
	} {
		for _, named := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, named %v", name, named), func(t *testing.T) {
				f := newFake(t)
				other := f.add("root-2", newRoot(t, "root 2", 24*365*time.Hour))
				signs := f.issuers[0]
				if !named {
					signs = other
				}
				var told []error
				u := f.upstream(nil, func(c Call) {
					if c.Operation == OpRely {
						told = append(told, c.Err)
					}
				})
				relied := []string{"", signs.id}
				u.Rely(func() []string { return relied })
				look := func(kind Kind, want string) {
					t.Helper()
					if _, err := u.Issuers(t.Context()); err != nil {
						t.Fatal(err)
					}
					err := told[len(told)-1]
					if last := u.Status().LastError; KindOf(err) != kind || KindOf(last) != kind {
						t.Errorf("told is %v, and the status has %v", err, last)
					}
					if err != nil && (!strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), signs.id)) {
						t.Errorf("told is %v, want a word on %q", err, want)
					}
				}
				look(KindNone, "")
				f.set(func() { c.spoil(f, signs) })
				look(c.kind, c.want)
				look(c.kind, c.want)
				relied = nil
				look(KindNone, "")
			})
		}
	}
}

// TestNameThatMoves: whoever administers Vault gives the name to another key. We go on with ours, and say so.
func TestNameThatMoves(t *testing.T) {
	f := newFake(t)
	u := f.upstream(nil)
	before, err := u.Issuers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	other := f.add("", newRoot(t, "another", 24*365*time.Hour))
	f.set(func() { f.names[before[0].Ref], f.names[other.id], f.default_ = "", "root-1", other.id })
	after, err := u.Issuers(t.Context())
	if err != nil || after[0].Ref != before[0].Ref || !after[0].Named || after[1].Named {
		t.Fatalf("got %+v, %v, want the issuer that had the name first", after, err)
	}
	if notice := u.Status().Notice; !strings.Contains(notice, other.id) || !strings.Contains(notice, "set upstream.vault.issuer to "+before[0].Ref) {
		t.Errorf("notice: %q", notice)
	}
}

func TestIssuerThatIsNot(t *testing.T) {
	f := newFake(t)
	all, err := f.upstream(func(c *Config) { c.Issuer = "root-9" }).Issuers(t.Context())
	if err != nil || len(all) != 2 || !all[0].Named || KindOf(all[0].Fault) != KindMissing || !strings.Contains(all[0].Fault.Error(), `"root-1"`) ||
		!strings.Contains(all[0].Fault.Error(), "Set upstream.vault.issuer") || all[1].Named || all[1].Fault != nil {
		t.Errorf("got %+v, %v, want the named one with a fault that lists those there are, and those", all, err)
	}
	u := f.upstream(nil)
	issuers, err := u.Issuers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.set(func() { f.issuers = nil })
	gone, err := u.Issuers(t.Context())
	if err != nil || len(gone) != 1 || gone[0].Ref != issuers[0].Ref || gone[0].Fault == nil {
		t.Errorf("got %+v, %v, want the one that was deleted, with a fault", gone, err)
	}
}

func TestManyIssuersAreBounded(t *testing.T) {
	f := newFake(t)
	like := newRoot(t, "one of many", 24*365*time.Hour)
	for range 50 {
		a := *like
		f.add("", &a)
	}
	u := f.upstream(nil)
	issuers, err := u.Issuers(t.Context())
	if err != nil || len(issuers) != maxIssuers || u.Status().LeftOut != 51-maxIssuers {
		t.Errorf("got %d issuers and %d left out, %v", len(issuers), u.Status().LeftOut, err)
	}
	// Those that somebody asks for are read, by their ids and their names.
	var unread []string
	for _, a := range f.issuers {
		if !slices.ContainsFunc(issuers, func(i ca.UpstreamIssuer) bool { return i.Ref == a.id }) {
			unread = append(unread, a.id)
		}
	}
	f.set(func() { f.names[unread[1]] = "the-second" })
	u.Include(unread[0], "the-second", "nobody", "default/../x")
	issuers, err = u.Issuers(t.Context())
	if err != nil || len(issuers) != maxIssuers || !issuers[0].Named || issuers[1].Ref != unread[0] || issuers[2].Ref != unread[1] || u.Status().LeftOut != 51-maxIssuers {
		t.Errorf("got %d issuers, %+v first, and %d left out, %v", len(issuers), issuers[:3], u.Status().LeftOut, err)
	}
	u.Include(unread...)
	if n := len(u.order(listing{Keys: unread}, "")); n > maxIssuers || len(u.included) != maxIncluded {
		t.Errorf("%d are read, %d are remembered", n, len(u.included))
	}
}

func TestPath(t *testing.T) {
	const year = 24 * 365 * time.Hour
	old, young := newRoot(t, "old root", year), newRoot(t, "young root", year)
	middle := newBelow(t, old, "middle", year)
	// young, cross-signed by old: the same name and key, another end.
	template := *young.cert
	cross := mustSign(t, &template, old.cert, young.key.Public(), old.key)
	leaf := newBelow(t, young, "leaf", year)

	for name, c := range map[string]struct {
		from    *x509.Certificate
		anchors []*x509.Certificate
		in      []*x509.Certificate
		want    []*x509.Certificate
		err     error
	}{
		"root alone":      {from: old.cert, want: []*x509.Certificate{old.cert}},
		"one end":         {from: middle.cert, in: []*x509.Certificate{young.cert, old.cert}, want: []*x509.Certificate{middle.cert, old.cert}},
		"no end":          {from: middle.cert, in: []*x509.Certificate{young.cert}, want: []*x509.Certificate{middle.cert}, err: errNoAnchor},
		"cross-signed":    {from: leaf.cert, in: []*x509.Certificate{cross, young.cert, old.cert}, err: errManyAnchors},
		"cross, old":      {from: leaf.cert, in: []*x509.Certificate{cross, young.cert}, anchors: []*x509.Certificate{old.cert}, want: []*x509.Certificate{leaf.cert, cross, old.cert}},
		"cross, young":    {from: leaf.cert, in: []*x509.Certificate{cross, young.cert, old.cert}, anchors: []*x509.Certificate{young.cert}, want: []*x509.Certificate{leaf.cert, young.cert}},
		"cross, no young": {from: leaf.cert, in: []*x509.Certificate{cross, old.cert}, want: []*x509.Certificate{leaf.cert, cross, old.cert}},
	} {
		p := newPool(c.anchors)
		p.add(c.in...)
		got, err := p.path(c.from)
		if !errors.Is(err, c.err) || (c.err == nil) != (err == nil) || len(got) != len(c.want) {
			t.Errorf("%s: got a path of %d, %v, want %d, %v", name, len(got), err, len(c.want), c.err)
			continue
		}
		for i := range got {
			if !got[i].Equal(c.want[i]) {
				t.Errorf("%s: certificate %d is %s", name, i, got[i].Subject)
			}
		}
	}
}

func FuzzAnswers(f *testing.F) {
	root := newRoot(f, "root", time.Hour)
	f.Add([]byte(`{"data":{"issuer_id":"a","certificate":` + quote(encode(root.cert)) + `,"ca_chain":[` + quote(encode(root.cert)) + `],"key_id":"k","usage":"issuing-certificates"}}`))
	f.Add([]byte(`{"data":{"certificate":` + quote(encode(root.cert)) + `,"issuing_ca":` + quote(encode(root.cert)) + `}}`))
	f.Add([]byte(`{"data":{"keys":["a","b"],"key_info":{"a":{"issuer_name":"x"}}}}`))
	f.Add([]byte(`{"auth":{"client_token":"hvs.x","lease_duration":-1}}`))
	f.Add([]byte(`{"data":null}`))
	f.Fuzz(func(t *testing.T, answer []byte) {
		u, err := New(Config{Address: "http://127.0.0.1:1", Issuer: "x", Auth: AuthConfig{TokenFile: "/nowhere"}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		var l listing
		if _, err := decode(answer, &l); err == nil {
			if len(u.order(l, u.resolve(l))) > maxIssuers {
				t.Fatal("more issuers than are read")
			}
			_ = names(l)
			_ = u.moved(l, "x")
		}
		var e entry
		if _, err := decode(answer, &e); err == nil {
			if x, err := parseIssuer(e); err == nil {
				all := newPool(nil)
				all.add(x.cert)
				all.add(x.chain...)
				if s := u.show(x.ID, x.Name, x, nil, all); s.Fault == nil && (s.Root == nil || !selfSigned(s.Root)) {
					t.Fatal("an issuer without fault has no root")
				}
			}
		}
		var s signed
		if _, err := decode(answer, &s); err == nil {
			if chain, err := u.assemble("x", s, nil); err == nil && (len(chain) == 0 || len(chain) >= maxPath+1 || selfSigned(chain[0])) {
				t.Fatalf("a chain of %d", len(chain))
			}
		}
		if text := scrub(string(answer), newSecret("hvs.x-and-more")); len(text) > maxText+len("…") || strings.Contains(text, "hvs.x-and-more") {
			t.Fatalf("told %q", text)
		}
	})
}

func quote(s string) string { return `"` + strings.ReplaceAll(s, "\n", `\n`) + `"` }
