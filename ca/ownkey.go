package ca

import (
	"crypto"
	"slices"
)

// maxFormerKeys bounds the memory of keys that this process used: some days of intermediates and serving keys. Keys in use
// do not count.
const maxFormerKeys = 64

// adopt remembers keys as the CA's own: user uses these from now on, and no longer those of before.
func (a *Authority) adopt(user any, keys ...crypto.PublicKey) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.hold(user, keys...)
}

// adoptChains has a line use the keys of the chain that is in use, and of one that is about to be, if there is one.
func (a *Authority) adoptChains(l *Line, coming *Signer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var keys []crypto.PublicKey
	for _, s := range []*Signer{l.current.Load(), coming} {
		if s == nil {
			continue
		}
		for _, c := range s.chain {
			keys = append(keys, c.PublicKey)
		}
	}
	a.hold(l, keys...)
}

// hold is adopt; a.mu is held.
func (a *Authority) hold(user any, keys ...crypto.PublicKey) {
	names := make([]string, 0, len(keys))
	for _, k := range keys {
		names = append(names, keyName(k))
	}
	for _, name := range a.used[user] {
		if !slices.Contains(names, name) {
			a.former = append(slices.DeleteFunc(a.former, func(n string) bool { return n == name }), name)
		}
	}
	a.former = slices.Clone(a.former[max(0, len(a.former)-maxFormerKeys):])
	if a.used[user] = names; len(names) == 0 {
		delete(a.used, user)
	}
	own := map[string]struct{}{}
	for _, names := range a.used {
		for _, name := range names {
			own[name] = struct{}{}
		}
	}
	for _, name := range a.former {
		own[name] = struct{}{}
	}
	a.ownSet.Store(&own)
}

// IsOwnKey reports whether pub is a key of the CA itself: a root's, one of a chain, the serving SVID's, or one that this
// process used before. It is asked for each issuance.
func (a *Authority) IsOwnKey(pub crypto.PublicKey) bool {
	name := keyName(pub)
	if name == "" {
		return false
	}
	_, root := (*a.c.Trust.rootKeys.Load())[name]
	if own := a.ownSet.Load(); own != nil && !root {
		_, root = (*own)[name]
	}
	return root
}
