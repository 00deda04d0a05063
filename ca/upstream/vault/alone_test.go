package vault

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/ca"
)

// deny has the fake refuse to tell of an issuer, as a policy does that is for another one alone.
func (f *fake) deny(id string) {
	f.set(func() {
		f.answer = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, "/issuer/"+id) {
				return false
			}
			reply(w, 403, map[string]any{"errors": []string{"1 error occurred: permission denied"}})
			return true
		}
	})
}

// pollsApart polls as often as asked, as far apart as polls are for a login that a 403 may bring.
func pollsApart(t *testing.T, u *Upstream, n int) (last []ca.UpstreamIssuer, err error) {
	t.Helper()
	for range n {
		if at := u.login.stuck.Load(); at != nil {
			before := at.Add(-u.c.Poll.Duration)
			u.login.stuck.Store(&before)
		}
		last, err = u.Issuers(t.Context())
	}
	return last, err
}

// A policy may be for one issuer alone, as deploy/vault says. Another one that comes into the mount is a candidate that
// cannot be read: that says nothing of our login, and nothing of Vault.
func TestAPolicyForOneIssuerAlone(t *testing.T) {
	f := newFake(t)
	var calls []Call
	u := f.upstream(nil, func(c Call) { calls = append(calls, c) })
	other := f.add("root-2", newRoot(t, "root 2", 24*365*time.Hour))
	f.deny(other.id)
	issuers, err := pollsApart(t, u, 10)
	if err != nil || len(issuers) != 2 || issuers[0].Fault != nil || issuers[1].Name != "root-2" {
		t.Fatalf("got %+v, %v, want both issuers", issuers, err)
	}
	if why := issuers[1].Fault; KindOf(why) != KindDenied || !strings.Contains(why.Error(), `path "pki/issuer/`+other.id+`" {`) {
		t.Errorf("the candidate's fault is %v, want the policy's text", why)
	}
	if f.logins != 1 || len(f.tokens) != 1 {
		t.Errorf("%d logins and %d tokens alive, want one", f.logins, len(f.tokens))
	}
	if st := u.Status(); st.LastError != nil {
		t.Errorf("the status has the error %v", st.LastError)
	}
	if i := slices.IndexFunc(calls, func(c Call) bool { return c.Err != nil && !c.Candidate }); i >= 0 {
		t.Errorf("a call that says something of Vault failed: %+v", calls[i])
	}
}

// Whom a command names is asked for under a fresh login, once; it is told why that does not help, and polls go on.
func TestAnIssuerThatACommandNamesAndAPolicyDenies(t *testing.T) {
	f := newFake(t)
	u := f.upstream(nil)
	other := f.add("root-2", newRoot(t, "root 2", 24*365*time.Hour))
	f.deny(other.id)
	u.Include("root-2")
	issuers, err := u.Issuers(t.Context())
	if err != nil || len(issuers) != 2 || KindOf(issuers[1].Fault) != KindDenied || f.logins != 2 {
		t.Fatalf("got %+v, %v after %d logins, want a fault after the second", issuers, err, f.logins)
	}
	if _, err := pollsApart(t, u, 10); err != nil || f.logins != 2 {
		t.Errorf("%v after %d logins, want two", err, f.logins)
	}
	if st := u.Status(); st.LastError != nil {
		t.Errorf("the status has the error %v", st.LastError)
	}
	f.set(func() { f.answer = nil })
	u.Include("root-2")
	if issuers, err := u.Issuers(t.Context()); err != nil || issuers[1].Fault != nil {
		t.Errorf("once it is granted: %+v, %v", issuers, err)
	}
}

// The issuer that signs may be another one than the configuration names. That a policy denies it is told for as long as it
// does, whatever else is read: the next that would be heard of it is a signing that fails.
func TestAPolicyThatDeniesTheIssuerThatSigns(t *testing.T) {
	f := newFake(t)
	told := map[Operation]error{}
	u := f.upstream(nil, func(c Call) { told[c.Operation] = c.Err })
	other := f.add("root-2", newRoot(t, "root 2", 24*365*time.Hour))
	f.add("root-3", newRoot(t, "root 3", 24*365*time.Hour)) // which is read after it
	signs := []string{other.id, ""}
	u.Rely(func() []string { return signs })
	f.deny(other.id)
	for n := range 3 {
		issuers, err := pollsApart(t, u, 1)
		if err != nil || len(issuers) != 3 || KindOf(issuers[1].Fault) != KindDenied {
			t.Fatalf("poll %d: got %+v, %v, want all issuers, and a fault", n, issuers, err)
		}
		if last := u.Status().LastError; KindOf(last) != KindDenied || !strings.Contains(last.Error(), other.id) || KindOf(told[OpRely]) != KindDenied {
			t.Errorf("poll %d: the status has %v, and told is %v", n, last, told[OpRely])
		}
	}
	signs = nil // it was rotated away from
	if _, err := pollsApart(t, u, 1); err != nil || u.Status().LastError != nil || told[OpRely] != nil {
		t.Errorf("when it signs no more: %v, the status has %v, and told is %v", err, u.Status().LastError, told[OpRely])
	}
	signs = []string{other.id}
	f.set(func() { f.answer = nil })
	if issuers, err := pollsApart(t, u, 1); err != nil || issuers[1].Fault != nil || u.Status().LastError != nil || told[OpRely] != nil {
		t.Errorf("once it is granted: %+v, %v, the status has %v, and told is %v", issuers, err, u.Status().LastError, told[OpRely])
	}
}

// The token that a fresh login replaces is given back, and polls that go on to be denied do not use up a secret id.
func TestReplacedTokensAreGivenBack(t *testing.T) {
	f := newFake(t)
	f.deny(f.issuers[0].id)
	u := f.upstream(nil)
	if _, err := pollsApart(t, u, 5); KindOf(err) != KindDenied || f.logins != 2 {
		t.Errorf("%v after %d logins, want two", err, f.logins)
	}
	for range 3 {
		if _, err := u.login.afresh(t.Context(), u.login.now.Load()); err != nil {
			t.Fatal(err)
		}
	}
	alive := func() int { f.mu.Lock(); defer f.mu.Unlock(); return len(f.tokens) }
	eventually(t, "one token alone is alive", func() bool { return alive() == 1 })
	if !f.tokens[u.login.now.Load().token.reveal()] {
		t.Error("it is not the one in use")
	}
	if err := u.Close(); err != nil || alive() != 0 {
		t.Errorf("%v, and %d tokens are left behind", err, alive())
	}
}

// A call that holds the login which is being replaced is made again under the next one.
func TestACallUnderALoginThatIsReplaced(t *testing.T) {
	f := newFake(t)
	u := f.upstream(nil)
	if _, err := u.Issuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	u.login.helped(false) // a moment ago, so that no 403 brings a login
	replaced := false
	f.set(func() {
		f.answer = func(w http.ResponseWriter, r *http.Request) bool {
			if replaced || !strings.HasSuffix(r.URL.Path, "/issuer/"+f.issuers[0].id) {
				return false
			}
			replaced = true
			f.mu.Unlock()
			_, err := u.login.afresh(t.Context(), u.login.now.Load())
			f.mu.Lock()
			if err != nil {
				t.Error(err)
			}
			reply(w, 403, map[string]any{"errors": []string{"permission denied"}})
			return true
		}
	})
	if _, err := u.Issuers(t.Context()); err != nil || f.logins != 2 {
		t.Errorf("%v after %d logins", err, f.logins)
	}
}
