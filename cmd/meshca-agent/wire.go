package main

import (
	"context"
	"io"
	"log/slog"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/csi"
)

// run puts the agent together and runs it until ctx ends.
func run(ctx context.Context, c *Config, stderr io.Writer) error {
	level, err := c.logLevel()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: level}))
	config, err := c.agent(log)
	if err != nil {
		return err
	}
	if c.CSI.Enabled {
		driver, err := csi.New(c.CSI.driver(c.RuntimeDir, log))
		if err != nil {
			return err
		}
		config.Sources = append(config.Sources, driver)
	}
	delivered, err := c.files(log)
	if err != nil {
		return err
	}
	if delivered != nil {
		config.Sources = append(config.Sources, delivered)
	}
	a, err := agent.New(config)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}
