package disk

import (
	"context"
	"crypto"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca/pkcs11"
)

// What a token is needed for, or cannot do, is said; nothing is made then. What works with a token is in test/softhsm.
func TestKeysInTokensThatCannotBe(t *testing.T) {
	const uri = "pkcs11:token=a;object=root?module-path=/m.so&pin-source=/pin"
	good := created(t, CreateOptions{})
	dir := filepath.Join(t.TempDir(), "new")
	to := func(f Files) Files {
		f.Cert = filepath.Join(dir, "root.crt")
		f.Tokens = pkcs11.New()
		return f
	}
	for name, c := range map[string]struct {
		from, to Files
		want     string
	}{
		"a passphrase":                 {Files{Cert: good.Cert}, to(Files{Key: uri, Passphrase: "x"}), "knows no passphrase"},
		"no key":                       {Files{Cert: good.Cert}, to(Files{Key: "pkcs11:token=a?module-path=/m.so&pin-source=/pin"}), "names no key"},
		"a PIN in the URI":             {Files{Cert: good.Cert}, to(Files{Key: "pkcs11:token=a;object=b?module-path=/m.so&pin-value=1"}), "mode 0600"},
		"a key file into a token":      {good, to(Files{Key: uri}), "the token's own tools"},
		"a key out of its token":       {Files{Cert: good.Cert, Key: uri}, to(Files{Key: filepath.Join(dir, "root.key")}), "does not leave its PKCS #11 token"},
		"a token that does not answer": {Files{Cert: good.Cert}, to(Files{Key: uri}), "pkcs11:token=a;object=root"},
	} {
		_, err := Import(c.from, c.to)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
		if _, err := os.Lstat(dir); err == nil {
			t.Fatalf("%s: something was made", name)
		}
	}
}

// A successor in a token cannot be found from a root in files, and one in another token neither.
func TestASuccessorElsewhere(t *testing.T) {
	f := created(t, CreateOptions{})
	successors := t.TempDir()
	if _, err := Create(Files{Cert: filepath.Join(successors, "root-1.crt"), Key: filepath.Join(successors, "root-1.key")}, CreateOptions{TrustDomain: domain}); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(successors, "root-1.pkcs11")
	if err := os.WriteFile(name, []byte("pkcs11:token=b;object=root-1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(successors, "root-2.pkcs11") // a crash came before its certificate
	if err := os.WriteFile(half, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	faults := func() (half, whole string) {
		u, err := Open(Options{Root: f, Successors: successors, TrustDomain: domain})
		if err != nil {
			t.Fatal(err)
		}
		all, err := u.Issuers(t.Context())
		if err != nil || len(all) != 3 || all[0].Fault != nil || all[1].Fault == nil || all[2].Fault == nil || all[2].Root == nil {
			t.Fatalf("issuers %+v, %v", all, err)
		}
		return all[1].Fault.Error(), all[2].Fault.Error()
	}
	if h, w := faults(); !strings.Contains(h, half) || !strings.Contains(w, name) || !strings.Contains(w, "name the token's key as the root's") {
		t.Errorf("half made: %s; whole: %s", h, w)
	}
	f.Key, f.Tokens = "pkcs11:token=a;object=root?module-path=/m.so&pin-source=/pin", pkcs11.New()
	if h, w := faults(); !strings.Contains(h, half) || !strings.Contains(w, "another PKCS #11 token") {
		t.Errorf("half made: %s; whole: %s", h, w)
	}
	if err := os.Remove(half); err != nil {
		t.Fatal(err)
	}
	// The token is not asked at the start; where it is away that is the issuer's fault, once somebody asked.
	if err := os.WriteFile(name, []byte("pkcs11:token=a;object=root-1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	u, err := Open(Options{Root: f, Successors: successors, TrustDomain: domain})
	if err != nil || len(u.issuers) != 2 {
		t.Fatalf("%+v, %v", u, err)
	}
	if all, err := u.Issuers(t.Context()); err != nil || all[0].Fault != nil {
		t.Errorf("%+v, %v", all, err)
	}
	if _, err := u.SignIntermediate(t.Context(), u.issuers[0].ref, request(t, 0)); err == nil {
		t.Error("a life of nothing")
	}
	if _, err := u.SignIntermediate(t.Context(), u.issuers[0].ref, request(t, 1e12)); err == nil || !strings.Contains(err.Error(), "pkcs11:token=a;object=root") {
		t.Errorf("signed with a token that is not there: %v", err)
	}
	if all, err := u.Issuers(t.Context()); err != nil || all[0].Fault == nil || all[0].Root == nil {
		t.Errorf("%+v, %v", all, err)
	}
	if err := u.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "pkcs11:token=a") {
		t.Errorf("check: %v", err)
	}
}

// mute is a key in a token that never answers.
type mute struct{ crypto.Signer }

func (mute) SignContext(ctx context.Context, _ io.Reader, _ []byte, _ crypto.SignerOpts) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func TestARootsKeyIsNotWaitedForBeyondTheCall(t *testing.T) {
	u, err := Open(Options{Root: created(t, CreateOptions{})})
	if err != nil {
		t.Fatal(err)
	}
	u.issuers[0].key = mute{u.issuers[0].key}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := u.SignIntermediate(ctx, u.issuers[0].ref, request(t, time.Hour)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
