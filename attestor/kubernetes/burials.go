package kubernetes

import "time"

const (
	// buriedFor is for how long at least the UID of a deleted object is remembered, if there are not too many.
	buriedFor = time.Minute
	// maxBuried bounds those of one such time. What is not remembered is read live.
	maxBuried = 50_000
)

// burials are the UIDs of objects that the API server said were deleted. A UID is never used again, so that word is final:
// it needs no second look, unlike an object's absence from a list, which may be an old one. The zero value is ready.
type burials struct {
	young, old map[string]struct{}
	turned     time.Time
}

func (b *burials) add(uid string, now time.Time) {
	if b.young == nil || now.Sub(b.turned) > buriedFor {
		b.young, b.old, b.turned = map[string]struct{}{}, b.young, now
	}
	if len(b.young) < maxBuried {
		b.young[uid] = struct{}{}
	}
}

func (b *burials) has(uid string) bool {
	if _, ok := b.young[uid]; ok {
		return true
	}
	_, ok := b.old[uid]
	return ok
}
