package vault

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/meshca/meshca/rotation"
)

const (
	// endless stands for the lease of a token that has no end: it is looked at again after most of it.
	endless = 24 * time.Hour
	// patience is how long a 403 that a fresh login did not lift keeps the next 403 of a poll from bringing one, while the
	// token still stands: polls are many, and secret ids can be made for a few uses alone. So it is longer than the usual
	// pause between polls. Each try to sign brings one all the same.
	patience = 5 * time.Minute
	// farewell bounds the giving back of a login.
	farewell = 2 * time.Second
)

// session is one login, with connections of its own.
type session struct {
	client  *api.Client
	close   func()
	secrets []secret // the token, and what it was got with
	granted
	at time.Time
	// ends is when the lease ends; the watcher moves it. owner: watch
	ends atomic.Pointer[time.Time]
	// spent says that nothing extends the lease any more: it is to be replaced, and serves until it is.
	spent atomic.Bool
	// over says that it is of no use.
	over atomic.Bool
}

// left is what is left of the lease.
func (s *session) left() time.Duration { return time.Until(*s.ends.Load()) }

func (s *session) usable() bool { return !s.over.Load() && s.left() > 0 }

func (s *session) extend(lease time.Duration) {
	if lease == 0 {
		lease = endless
	}
	end := time.Now().Add(lease)
	s.ends.Store(&end)
}

func (s *session) life() time.Duration {
	if s.lease == 0 {
		return endless
	}
	return s.lease
}

// login is our standing with Vault. It is a rotation.Subject: a LifetimeWatcher extends each session for as long as
// Vault allows, and Keep brings the next one. Whoever needs a session before Keep has made one makes it himself.
type login struct {
	c     Config
	skew  *skew
	told  func(Call)
	slot  chan struct{} // holds one while somebody logs in
	wake  chan struct{} // of Keep
	now   atomic.Pointer[session]
	stuck atomic.Pointer[time.Time] // when a fresh login last did not lift a 403
	state *state
	gone  sync.WaitGroup // sessions that are being given back

	watched *watch // owner: Keep's goroutine
}

var _ rotation.Subject = (*login)(nil)

func newLogin(c Config, skew *skew, st *state, told func(Call)) *login {
	return &login{c: c, skew: skew, state: st, told: told, slot: make(chan struct{}, 1), wake: make(chan struct{}, 1)}
}

// session returns the login that is in use, or logs in.
func (l *login) session(ctx context.Context) (*session, error) {
	if s := l.now.Load(); s != nil && s.usable() {
		return s, nil
	}
	return l.afresh(ctx, l.now.Load())
}

// afresh replaces a session, unless somebody else has done so meanwhile. Of many callers one logs in.
func (l *login) afresh(ctx context.Context, old *session) (*session, error) {
	select {
	case l.slot <- struct{}{}:
		defer func() { <-l.slot }()
	case <-ctx.Done():
		return nil, explain(l.c, request{what: "logging in by " + l.c.Auth.kind()}, ctx.Err())
	}
	if s := l.now.Load(); s != old && s != nil && s.usable() {
		return s, nil
	}
	began := time.Now()
	s, err := l.logIn(ctx)
	l.state.called(OpLogin, err)
	l.told(Call{Operation: OpLogin, Took: time.Since(began), Err: err})
	if err != nil {
		return nil, err
	}
	l.now.Store(s)
	if old != nil {
		l.part(old)
	}
	l.rouse()
	return s, nil
}

func (l *login) logIn(ctx context.Context) (*session, error) {
	client, closeIdle, err := newClient(l.c, l.skew)
	if err != nil {
		return nil, unprepared(err)
	}
	g, used, err := l.c.Auth.logIn(ctx, client)
	if err != nil {
		closeIdle()
		return nil, l.c.Auth.loginFault(l.c, err, used)
	}
	client.SetToken(g.token.reveal())
	s := &session{client: client, close: closeIdle, secrets: used, granted: g, at: time.Now()}
	s.extend(g.lease)
	return s, nil
}

// part gives a session back that was replaced, and has nobody wait for that: a token that was answered 403 may well live.
func (l *login) part(old *session) {
	old.over.Store(true)
	l.gone.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), farewell)
		defer cancel()
		l.revoke(ctx, old)
		old.close() // idle connections; one that is in use ends with its call
	})
}

// revoke ends a token that came out of a login; one from a file is somebody else's.
func (l *login) revoke(ctx context.Context, s *session) {
	if l.c.Auth.TokenFile == "" && s.left() > 0 {
		_, _ = send(ctx, s.client, request{path: revokeSelf, body: map[string]string{}}, nil)
	}
}

// unprepared is the fault where there is no client. Vault's library reads its own variables of the environment, though nothing
// that they say is used, and gives up where it cannot.
func unprepared(err error) *Fault {
	f := &Fault{Kind: KindFile, What: "preparing the connection to Vault", Why: scrub(err.Error()), Do: "Look at the files that upstream.vault names", cause: err}
	var set []string
	for _, variable := range os.Environ() { //nolint:forbidigo // it sets nothing here: names alone, for the sentence
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "VAULT_") {
			set = append(set, name)
		}
	}
	if _, library := errors.AsType[*libraryError](err); library && len(set) > 0 {
		f.Kind, f.Do = KindOther, "It is about the CA's environment, of which nothing is used: unset "+strings.Join(set, ", ")
	}
	return f
}

// worthwhile says whether a 403 under a session is to bring a fresh one. One to a signing always is: a role may have got
// its policy back, which only those who log in then have, and an intermediate hangs on it. Where the session was replaced
// meanwhile, and so given back, the fresh one is there.
func (l *login) worthwhile(ctx context.Context, s *session, op Operation) bool {
	at := l.stuck.Load()
	if at == nil || op == OpSign || time.Since(*at) > patience || l.now.Load() != s {
		return true
	}
	_, err := send(ctx, s.client, request{path: lookupSelf}, nil)
	return denied(err)
}

// helped says what a fresh login did to a 403.
func (l *login) helped(yes bool) {
	if yes {
		l.stuck.Store(nil)
		return
	}
	now := time.Now()
	l.stuck.Store(&now)
}

// drop has the next call log in.
func (l *login) drop(s *session) {
	s.over.Store(true)
	s.close()
	l.rouse()
}

func (l *login) rouse() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// follow has a token file's new content taken up.
func (l *login) follow() {
	if l.c.Auth.TokenFile == "" {
		return
	}
	s := l.now.Load()
	token, err := readSecret(l.c.Auth.TokenFile)
	if s != nil && err == nil && token.reveal() != s.token.reveal() {
		l.drop(s)
	}
}

// Renew sees to it that there is a session that will last, and that it is watched. It logs in when there is none.
func (l *login) Renew(ctx context.Context) (rotation.Term, error) {
	ctx, cancel := context.WithTimeout(ctx, l.c.Timeout.Duration)
	defer cancel()
	s := l.now.Load()
	if s == nil || !s.usable() || s.spent.Load() || s.left() <= s.life()/10 {
		var err error
		if s, err = l.afresh(ctx, s); err != nil {
			return rotation.Term{}, err
		}
	}
	if l.watched == nil || l.watched.of != s {
		l.watched.stop()
		l.watched = l.watch(s)
	}
	left := s.left()
	return rotation.Term{Life: max(left, s.life()), Left: left, Received: time.Now()}, nil
}

// Due is late: until then the watcher extends the lease, and what it extended is seen there.
func (l *login) Due(t rotation.Term) time.Time { return t.Issued().Add(t.Life - t.Life/10) }

// Expired does nothing: each call looks at the lease itself.
func (l *login) Expired() {}

// watch is a LifetimeWatcher at work on a session.
type watch struct {
	of    *session
	end   chan struct{} // closed to stop it
	ended chan struct{} // closed when it has
}

// watch extends a session's lease until Vault does not any more, and wakes Keep then.
func (l *login) watch(s *session) *watch {
	w := &watch{of: s, end: make(chan struct{}), ended: make(chan struct{})}
	if s.lease == 0 {
		close(w.ended)
		return w
	}
	watcher, err := s.client.NewLifetimeWatcher(&api.LifetimeWatcherInput{
		Secret: &api.Secret{Auth: &api.SecretAuth{
			ClientToken: s.token.reveal(), LeaseDuration: int(s.lease / time.Second), Renewable: s.renewable,
		}},
	})
	if err != nil { // it wants a secret, and there is one
		close(w.ended)
		return w
	}
	go watcher.Start()
	go func() {
		defer close(w.ended)
		defer watcher.Stop()
		for {
			select {
			case <-w.end:
				return
			case renewed := <-watcher.RenewCh():
				if auth := renewed.Secret.Auth; auth != nil {
					s.extend(seconds(auth.LeaseDuration))
					l.told(Call{Operation: OpRenew})
				}
			case err := <-watcher.DoneCh():
				if err != nil && !s.over.Load() { // of one that was replaced, and so given back, nobody needs to hear
					err = explain(l.c, request{what: "extending the login", path: renewSelf, capability: "update"}, err, s.secrets...)
					l.state.called(OpRenew, err)
					l.told(Call{Operation: OpRenew, Err: err})
				}
				s.spent.Store(true)
				l.rouse()
				return
			}
		}
	}()
	return w
}

func (w *watch) stop() {
	if w == nil {
		return
	}
	select {
	case <-w.end:
	default:
		close(w.end)
	}
	<-w.ended
}

// leave gives the session back, after those that it replaced.
func (l *login) leave() {
	if s := l.now.Swap(nil); s != nil {
		l.part(s)
	}
	l.gone.Wait()
}

// shown is the session's part of a Status.
func (l *login) shown(st *Status) {
	st.LoginBy = l.c.Auth.kind()
	s := l.now.Load()
	if s == nil || !s.usable() {
		return
	}
	st.LoggedIn, st.LoggedInAt = true, s.at
	if s.lease != 0 {
		st.LeaseEnds = *s.ends.Load()
	}
}
